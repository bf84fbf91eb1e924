"""Looking into traced functions."""


def equations(jaxpr):
    """All equations, those inside of calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
