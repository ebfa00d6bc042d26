"""What fxopt did and what it is worth: `explain`, and the measurements behind `fxopt run` and `fxopt bench`."""

from fxopt.report.explanation import Explanation, explain

__all__ = ["Explanation", "explain"]
