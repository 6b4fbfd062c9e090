"""One process per device behind one port: a supervisor starts them and passes connections to them."""
