"""From predictions and truth to numbers: alignment, point and depth metrics, relief, rows, tables and pictures."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .alignment import IcpResult, Similarity, icp, umeyama
    from .depth import DepthMetrics, depth_metrics
    from .markdown import Column, depth_columns, markdown_table, point_columns, relief_columns
    from .normals import estimate_normals
    from .pictures import error_colors, error_figure, save_points
    from .planes import Plane, Relief, plane_fit, relief, sequence_relief
    from .points import PointMetrics, point_metrics
    from .resizing import resize_prediction
    from .skipping import SkippedError
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            ".alignment": ["IcpResult", "Similarity", "icp", "umeyama"],
            ".depth": ["DepthMetrics", "depth_metrics"],
            ".markdown": ["Column", "depth_columns", "markdown_table", "point_columns", "relief_columns"],
            ".normals": ["estimate_normals"],
            ".pictures": ["error_colors", "error_figure", "save_points"],
            ".planes": ["Plane", "Relief", "plane_fit", "relief", "sequence_relief"],
            ".points": ["PointMetrics", "point_metrics"],
            ".resizing": ["resize_prediction"],
            ".skipping": ["SkippedError"],
        },
    )

__all__ = [
    "Column",
    "DepthMetrics",
    "IcpResult",
    "Plane",
    "PointMetrics",
    "Relief",
    "Similarity",
    "SkippedError",
    "depth_columns",
    "depth_metrics",
    "error_colors",
    "error_figure",
    "estimate_normals",
    "icp",
    "markdown_table",
    "plane_fit",
    "point_columns",
    "point_metrics",
    "relief",
    "relief_columns",
    "resize_prediction",
    "save_points",
    "sequence_relief",
    "umeyama",
]
