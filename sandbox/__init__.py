"""The sandbox: a stand-in for the vendor Dataoorts that speaks its wire format and draws by rules.

And, on the same port, for the box: a machine with a GPU whose server speaks the Automatic1111 web UI's API.

It is a vendor, not a part of the service: nothing here imports `api`, `worker` or `shared`, and they do not import it.
"""
