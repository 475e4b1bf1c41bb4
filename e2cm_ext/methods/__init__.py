"""Early exits of other papers, on the same stages, runtime, calibration and report.

One module, one paper. Each has build(model, example_input, ...), which returns an EarlyExit whose exits are not trained
yet, and train(ee, loader, ...), which trains them by gradient descent. The exceptions are `joined`, which combines
trained exits with class means, and `curriculum`, which makes loaders.

`learned_head` has the base class of their heads, `training` the loop that all of them share.
"""
