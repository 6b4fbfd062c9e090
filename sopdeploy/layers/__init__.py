"""Second-order layers for your own networks: covariance, its square root, GSoP's block, GM-SOP's mixture."""

from sopdeploy.layers.covariance import covariance_matrix as covariance_matrix
from sopdeploy.layers.gsop_block import GSoPBlock as GSoPBlock
from sopdeploy.layers.gsop_block import GSoPBlockConfig as GSoPBlockConfig
from sopdeploy.layers.isqrt_cov import ISqrtCov as ISqrtCov
from sopdeploy.layers.isqrt_cov import NewtonSchulzConfig as NewtonSchulzConfig
from sopdeploy.layers.mixture import Components as Components
from sopdeploy.layers.mixture import SparseGate as SparseGate
from sopdeploy.layers.mixture import balance_loss as balance_loss
