"""What the command line needs: data, models, training jobs, the experiments of the paper. The library never imports it."""
