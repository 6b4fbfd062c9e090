"""Write the vectors of out-of-distribution photos, which come with the default network.

    python benchmarks/other_things.py FOLDER

FOLDER has one folder per class with a photograph each, such as those of
github.com/EliSchwartz/imagenet-sample-images. Of the classes, `COUNT` in equal distances are
taken, one photograph each.
"""

import sys
from pathlib import Path

import numpy as np

from sopdeploy.importers.published import PACKAGES
from sopdeploy.training.few_shot import other_things
from sopdeploy.training.few_shot.default_network import embed_files, open_default_network
from sopdeploy.training.few_shot.other_things import FOLDER, embed_reference, store_vectors

COUNT = 100


def main(folder: Path) -> None:
    """Write the vectors of `COUNT` photographs in *folder* for the packaged weights."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    chosen = np.linspace(0, len(classes) - 1, COUNT).round().astype(int)
    paths = [min(classes[number].iterdir()) for number in chosen.tolist()]
    vectors = np.stack([vector for _, vector in embed_files(paths)])
    sha256 = PACKAGES["timm/tf_efficientnet_lite0.in1k"].sha256
    target = Path(other_things.__file__).parent / FOLDER / f"{sha256}.npy"
    target.parent.mkdir(exist_ok=True)
    np.save(target, store_vectors(vectors), allow_pickle=False)

    outputs = open_default_network()
    reference = embed_reference(outputs.network, outputs.settings.preprocess)
    np.save(target.with_suffix(".reference.npy"), reference, allow_pickle=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
