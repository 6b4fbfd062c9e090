"""The page about an export: the numerical error as a picture, and facts that lead to their statements."""

import base64
import re

from sopdeploy.html.report import HtmlReport, Section, render
from sopdeploy_export.pack.drift_chart import draw_drift
from sopdeploy_export.pack.model_card import _facts_table, _statements_table
from sopdeploy_export.prove.certificate import STATEMENTS
from sopdeploy_export.prove.file import OutputParity, ParityReport


def parity(
    drift: dict[str, float], *, noise_floor: float = 1e-6, name: str = "logits"
) -> ParityReport:
    output = OutputParity(
        noise_floor=noise_floor, tolerance=16e-6, drift=drift, batch_difference=0.0
    )
    return ParityReport(
        runtime="onnxruntime", provider="CPU", num_images=12, outputs={name: output}, spread=1.0,
        flips={"noise": 0, "routing": 0, "error": 0}, operators={}, file_bytes=1, drift_allowed=False,
    )  # fmt: skip


def test_the_name_of_an_output_is_text_in_the_picture() -> None:
    figure = draw_drift(parity({"1": 1e-6}, name="<b>&"))
    assert (
        "&lt;b&gt;&amp;, batch 1"
        in base64.b64decode(figure.image.partition("base64,")[2]).decode()
    )


def test_each_fact_that_a_statement_proves_leads_to_it() -> None:
    facts = {"graph": "trained = plain", "types": "fp32", "numerical error": "1 rounding error"}
    tables = [_facts_table(facts), _statements_table()]
    page = render(HtmlReport(title="export", sections=[Section(title="proved", tables=tables)]))
    links = re.findall(r'<a href="#([\w-]+)">([^<]*)</a>', page)
    assert links == [("statement-graph", "Graph"), ("statement-file", "File")]
    ids = re.findall(r'<tr id="([\w-]+)">', page)
    assert len(ids) == len(set(ids)) == len(STATEMENTS)
    assert {name for name, _ in links} <= set(ids)
    sentences = [statement.STATEMENT for statement in STATEMENTS.values()]
    assert [text for text in sentences if text.replace("'", "&#39;") not in page] == []
