"""Classify all images of a folder with a running server, and write a line per image.

python client.py FOLDER [URL] > answers.csv
"""

import csv
import sys
from pathlib import Path

from sopdeploy.client import Client

folder, url = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000"
images = sorted(
    path
    for path in folder.rglob("*")
    if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}
)
write = csv.writer(sys.stdout)
write.writerow(("image", "class", "probability", "known", "error"))
with Client(url) as client:
    for first in range(0, len(images), 16):  # a request for 16 images, which the server batches
        some = images[first : first + 16]
        for image, answer in zip(some, client.classify(some), strict=True):
            best = answer.classes[0] if answer.classes else None
            row = (
                (best.label, f"{best.probability:.3f}", answer.known, "")
                if best
                else ("", "", "", answer.error.code)
            )
            write.writerow((image.relative_to(folder), *row))
