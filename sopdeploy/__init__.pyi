from sopdeploy import layers as layers
from sopdeploy.data.photos.photo import LabeledImages as LabeledImages
from sopdeploy.data.photos.photo import Split as Split
from sopdeploy.data.sources import DataSource as DataSource
from sopdeploy.data.sources import register_data_source as register_data_source
from sopdeploy.images.preprocess import Preprocess as Preprocess
from sopdeploy.layers.pooling.registry import register_pooling as register_pooling
from sopdeploy.models.describe import describe as describe
from sopdeploy.models.registry import list_models as list_models
from sopdeploy.models.user_network import dsop as dsop
from sopdeploy.models.user_network import isqrt as isqrt
from sopdeploy.models.user_network import register_model as register_model
from sopdeploy.training.pretrained import create_model as create_model
from sopdeploy.version import __version__ as __version__
from sopdeploy.weights.conversion import Importer as Importer
from sopdeploy.weights.conversion import register_importer as register_importer
from sopdeploy_commands.classify.run import classify as classify
from sopdeploy_commands.evaluate import evaluate as evaluate
from sopdeploy_commands.export import export as export
from sopdeploy_commands.predict import predict as predict
from sopdeploy_commands.serve import serve as serve
from sopdeploy_commands.train import train as train
from sopdeploy_export.options import ExportOptions as ExportOptions
from sopdeploy_export.user_network.admission import unused_modules as unused_modules
from sopdeploy_export.user_network.export_network import export_network as export_network
from sopdeploy_service.runtime.base import register_runtime as register_runtime

__all__: list[str]
