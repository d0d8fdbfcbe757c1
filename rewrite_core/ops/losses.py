"""How far a value is from its goal: the losses that the fits know."""

LOSSES = ("l1", "l2")  # mean absolute and mean squared error
