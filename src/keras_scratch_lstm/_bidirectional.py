"""Raise errors where `keras.layers.Bidirectional` would silently be wrong."""

import keras

from keras_scratch_lstm._types import Config


class BidirectionalGuard(keras.layers.RNN):
    """`keras.layers.RNN` that rejects lost weights and time-major outputs."""

    # Set by `to_scratch`, `from_torch` and `from_addons`.
    _has_converted_weights = False

    @property
    def zero_output_for_mask(self) -> bool:
        """Whether the output of a masked time step is zeros."""
        return self._zero_output_for_mask

    @zero_output_for_mask.setter
    def zero_output_for_mask(self, value: bool) -> None:
        # `Bidirectional` sets it on its layers, and flips axis 1 of what they return.
        if value and getattr(self, "time_major", False):
            raise ValueError(
                "`time_major` must be False within `keras.layers.Bidirectional` if "
                f"`return_sequences` is True. Received: `{self.name}` with "
                "time_major=True. Swap the first two axes around the wrapper instead."
            )
        self._zero_output_for_mask = value

    def get_build_config(self) -> Config:
        config = super().get_build_config()
        if self._has_converted_weights:
            return {**config, "converted": self.name}
        return config

    def build_from_config(self, config: Config) -> None:
        # `Bidirectional` prefixes the names of the layers that it re-creates.
        converted = (config or {}).get("converted")
        if self.name in (f"forward_{converted}", f"backward_{converted}"):
            raise ValueError(
                f"`Bidirectional` re-creates `{converted}` from its configuration and "
                "would lose its converted weights. Convert a bidirectional LSTM as a "
                "whole, or set the weights of `forward_layer` and `backward_layer`."
            )
        super().build_from_config(config)
