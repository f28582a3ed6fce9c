"""From a finished run to a model in use: found, loaded, evaluated, made to write, served."""
