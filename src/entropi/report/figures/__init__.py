"""Records and matrices in, matplotlib figures out; no global state of pyplot, no window.

Entropies are in nats. Layers and heads are counted from 0, layers by the model's own numbers where it has some without
attention. A number that is not finite leaves a gap and never an exception; a matrix that is empty, or ragged where
layers cannot differ, is a `UserError`.
"""

from entropi.report.figures.communication import (
    bytes_per_operation,
    folding,
    frontier,
    pareto,
    predicted_bytes,
    quantity,
)
from entropi.report.figures.drawing import (
    MISSING,
    colour_scale,
    ink_on,
    to_data_uri,
    to_pixels,
    write_figure,
)
from entropi.report.figures.entropy import (
    QUARTERS,
    entropy_by_position,
    entropy_distance,
    entropy_heatmap,
    grid,
    layerwise_entropy,
    mean_over_heads,
    quartile_shares,
    thresholds,
)
from entropi.report.figures.training import (
    gamma_sweep,
    loss_curves,
    perplexity_by_row,
    taper_gates,
)

__all__ = [
    "MISSING",
    "QUARTERS",
    "bytes_per_operation",
    "colour_scale",
    "entropy_by_position",
    "entropy_distance",
    "entropy_heatmap",
    "folding",
    "frontier",
    "gamma_sweep",
    "grid",
    "ink_on",
    "layerwise_entropy",
    "loss_curves",
    "mean_over_heads",
    "pareto",
    "perplexity_by_row",
    "predicted_bytes",
    "quantity",
    "quartile_shares",
    "taper_gates",
    "thresholds",
    "to_data_uri",
    "to_pixels",
    "write_figure",
]
