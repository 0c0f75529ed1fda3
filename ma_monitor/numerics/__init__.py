"""Arrays in, arrays out: the curve, the clock, the fit and the forecast. Imports numpy and scipy only."""
