"""What a program looks like and where its error comes from: summary, pictures, bisection, estimates, reports."""
