"""What a person does to the page, and what they see there."""

from typing import Any

import httpx

# What a test hands over as a file: in the page, as a drop or a paste.
HAND_OVER = """([kind, bytes, name, type]) => {
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
    page.evaluate(HAND_OVER, [kind, list(body), name, type])
    done(page)


def done(page: Any) -> None:
    page.wait_for_selector("#answer[aria-busy=false] :is(#classes li, #error:not([hidden]))")


def shown(page: Any) -> list[tuple[str, str]]:
    labels, percents = (
        page.locator(f"#classes .{part}").all_text_contents() for part in ("label", "percent")
    )
    return list(zip(labels, percents, strict=True))


def answered(client: httpx.Client, body: bytes, query: str = "") -> list[tuple[str, str]]:
    """What the API says to the same picture, as the page writes it."""
    classes = client.post(f"/v1/classify{query}", content=body).json()["classes"]
    digits = [2 if entry["probability"] < 0.0995 else 1 for entry in classes]
    return [
        (entry["label"], f"{100 * entry['probability']:.{count}f} %")
        for entry, count in zip(classes, digits, strict=True)
    ]
