"""Other people's early exits on the same stages, cascade, calibration and report: one file, one paper.

Each has build(model, example_input, ...) -> EarlyExit and train(ee, loader, ...). What they learn, they learn by
gradient descent: see `learned` for their heads and `training` for the loop.
"""
