"""How sure answers are: probabilities, sets, intervals and strangeness, fitted to subjects whom no head had seen."""
