"""Ray Tune lives here: the search for the weights of the tasks."""
