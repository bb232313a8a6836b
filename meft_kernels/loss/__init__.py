"""The loss of a language model without its logits ever being whole: a head that answers later, in chunks of rows."""

from .binding import LossBinding, bind_loss

__all__ = ["LossBinding", "bind_loss"]
