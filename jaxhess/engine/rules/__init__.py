"""How curvature passes one operation, a file for each kind of operation."""
