"""Methods on models of transformers: for its Trainer, for accelerate, and for plain loops."""

from hyper_tune.hf.accelerated import register_
from hyper_tune.hf.adaptation import adapt
from hyper_tune.hf.adapted import AdaptedModel
from hyper_tune.hf.callback import MethodCallback
from hyper_tune.hf.heads import new_modules
from hyper_tune.hf.optimizer import MethodOptimizer
from hyper_tune.hf.sharding import shard_

__all__ = [
    "AdaptedModel",
    "MethodCallback",
    "MethodOptimizer",
    "adapt",
    "new_modules",
    "register_",
    "shard_",
]
