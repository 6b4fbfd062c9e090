"""The parts of a training run that `sopdeploy.training.loop` puts together."""
