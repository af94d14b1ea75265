# What type checkers and editors see of `import coma`; `coma/__init__.py` imports each name on first use.

from coma.artifact import load_artifact as load_artifact
from coma.artifact import load_classifier as load_classifier
from coma.artifact import load_encoder as load_encoder
from coma.artifact import save_artifact as save_artifact
from coma.artifact.to_timm import create_timm as create_timm
from coma.config import PretrainConfig as PretrainConfig
from coma.config import encoder_preset as encoder_preset
from coma.config import method_preset as method_preset
from coma.config.artifact import ArtifactConfig as ArtifactConfig
from coma.errors import BadArtifact as BadArtifact
from coma.errors import BadInput as BadInput
from coma.errors import ComaError as ComaError
from coma.models import DyViT as DyViT
from coma.models import ViT as ViT
from coma.models import build_encoder as build_encoder
from coma.objectives import build_objective as build_objective
from coma.objectives.load import load_pretrained as load_pretrained
from coma.runtimes.open import open_runtime as open_runtime
from downstream.commands import classify as classify
from downstream.commands.embed import embed as embed
from downstream.configs.adapt import fit_backbone as fit_backbone
from export.commands.export import export as export
from pretrain.commands.api import evaluate as evaluate
from pretrain.commands.api import pretrain as pretrain
from pretrain.training.callbacks import Callback as Callback

__version__: str
__all__: list[str]
