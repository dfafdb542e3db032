"""Trajectory-aware calibration (LoopQ section 4.4): a student learns to follow the model in full precision through
all loops.

`student` makes a program differentiable, `learnable` says what may change and how, `teacher` and `objective` are what
the student is held against, `training` is the loop around them, `checkpoint` lets it go on after a kill.
"""
