"""Fair detection: a bounded perturbation of the picture that narrows a frozen detector's error gap between groups."""
