"""Statements about contrastive training and the experiments that test them; run by ``nearfar claims`` from a clone."""
