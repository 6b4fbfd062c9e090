import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import Compose, ToTensor
from torchvision.transforms import Normalize as TorchvisionNormalize

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize

MEANS = st.tuples(*[st.floats(0.0, 1.0)] * 3)
STDS = st.tuples(*[st.floats(0.01, 2.0)] * 3)


@given(mean=MEANS, std=STDS, seed=st.integers(0, 1000))
def test_normalize_equals_torchvision(mean, std, seed) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    expected = Compose([ToTensor(), TorchvisionNormalize(mean, std)])(Image.fromarray(image))
    found = Normalize(Preprocess(mean=mean, std=std))(torch.from_numpy(image)[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 / min(std))
