"""The experiments: a module each, called by its name in the ledger (see ``nearfar.lab.claims.ledger``)."""
