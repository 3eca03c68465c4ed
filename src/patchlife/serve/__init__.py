"""A service over HTTP: photos in, classes or embeddings out, in batches by budget. Ray Serve runs it.

`answering.py` knows the model and not HTTP; `application.py` knows HTTP and not Ray; `deployments.py` and `service.py`
know Ray. This module imports none of them.
"""
