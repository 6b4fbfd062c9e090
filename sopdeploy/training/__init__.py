"""The parts of a training run that `sopdeploy.train` puts together."""
