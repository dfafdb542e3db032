"""Trajectory-aware calibration (LoopQ section 4.4): a student learns to follow the full-precision model through all
loops.

`student` makes a program differentiable. `learnable` says what may change and how. `teacher` and `objective` define
what the student is compared with. `training` is the loop around them. `checkpoint` lets a killed run resume.
"""
