"""The paper's layers, with closed-form first-order passes in both differentiation modes."""

from jaxhess.layers.dense import dense

__all__ = ["dense"]
