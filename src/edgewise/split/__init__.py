"""One model on two machines: layers split between an edge and a worker, with a thin wire between."""
