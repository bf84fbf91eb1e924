"""The paper's layers, with closed-form first-order passes in both differentiation modes."""

from jaxhess.layers.dense import dense
from jaxhess.layers.recurrent import recurrent

__all__ = ["dense", "recurrent"]
