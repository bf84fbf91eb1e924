"""Doors to other libraries: `flax`, `linen` and `equinox` (drop-in layers), `scipy` (operators). Import the one you need."""
