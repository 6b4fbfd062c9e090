"""What the backbones' own papers print, and fast-MPN-COV's slides of the vectors that poolings give."""

from sopdeploy.models.printed_row import Row


def slide(pooling: str, model: str, dim: float, note: str = "") -> Row:
    """Return a row of the slides' table of fine-grained recognition: the length of a VGG-16's vector."""
    return Row(
        source="iSQRT-COV slides, fine-grained table",
        model=model,
        config={"pooling": pooling},
        dim=dim,
        cut=True,
        note=note,
    )


FREE = "the length of the sketch is free"
ROWS = (
    Row(source="He et al. 2016, Table 6", model="resnet20", params=0.27),
    Row(source="He et al. 2016, Table 6", model="resnet32", params=0.46),
    Row(source="He et al. 2016, Table 6", model="resnet44", params=0.66),
    Row(source="He et al. 2016, Table 6", model="resnet56", params=0.85),
    Row(source="He et al. 2016, Table 6", model="resnet110", params=1.7),
    Row(source="Zagoruyko and Komodakis 2016", model="wrn-22-10", params=26.8),
    Row(source="Zagoruyko and Komodakis 2016", model="wrn-28-10", params=36.5),
    Row(source="Xie et al. 2017", model="resnext29-8x64d", params=34.4),
    Row(source="Xie et al. 2017", model="resnext29-16x64d", params=68.1, cut=True),
    Row(source="Tan and Le 2019, Table 2", model="efficientnet-b0", params=5.3, ops=0.39),
    slide("isqrt", "isqrt-vgg16", 32),
    slide("mpncov", "mpncov-vgg16", 32),
    slide("bcnn", "bcnn-vgg16", 262),
    slide("improved-bcnn", "bcnn-vgg16", 262),
    slide("g2denet", "bcnn-vgg16", 263, "the full matrix; its triangle would be 131,841 long"),
    slide("netvlad", "netvlad-vgg16", 32),
    slide("cbp", "cbp-vgg16", 8, FREE),
    slide("low-rank-bilinear", "bcnn-vgg16", 10),
)
