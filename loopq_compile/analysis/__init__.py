"""Shows a program and the sources of its error: summary, pictures, bisection, estimates, reports."""
