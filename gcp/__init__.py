"""Training on Google Cloud: create a TPU, copy the code, train on all its workers, monitor, delete.

It builds gcloud command lines and runs them; it imports no JAX and no Google library.
"""
