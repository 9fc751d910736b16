"""Ray Tune lives here: the search for the weights of the tasks."""

import cluster as cluster  # for what it sets before Ray is imported
