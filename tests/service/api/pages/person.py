"""Actions of a user on the page, and its visible results."""

from typing import Any

import httpx

# Dispatches a drop or paste event with a file.
SEND_FILE = """([kind, bytes, name, type]) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], name, { type }));
  const traits = { bubbles: true, cancelable: true };
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { ...traits, clipboardData: files })
    : new DragEvent("drop", { ...traits, dataTransfer: files });
  document.getElementById("drop").dispatchEvent(event);
}"""


def give(
    page: Any, body: bytes, *, kind: str = "drop", name: str = "a.jpg", type: str = "image/jpeg"
) -> None:
    page.evaluate(SEND_FILE, [kind, list(body), name, type])
    done(page)


def done(page: Any) -> None:
    page.wait_for_selector("#answer[aria-busy=false] :is(#classes li, #error:not([hidden]))")


def shown(page: Any) -> list[tuple[str, str]]:
    labels, percents = (
        page.locator(f"#classes .{part}").all_text_contents() for part in ("label", "percent")
    )
    return list(zip(labels, percents, strict=True))


def expected(client: httpx.Client, body: bytes, query: str = "") -> list[tuple[str, str]]:
    """Response of the API to the same image, as the page formats it."""
    classes = client.post(f"/v1/classify{query}", content=body).json()["classes"]
    digits = [2 if entry["probability"] < 0.0995 else 1 for entry in classes]
    return [
        (entry["label"], f"{100 * entry['probability']:.{count}f} %")
        for entry, count in zip(classes, digits, strict=True)
    ]
