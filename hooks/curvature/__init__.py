"""Curvature on request: estimators of the Hessian, one per file, and the call that records them."""
