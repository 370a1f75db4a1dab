"""The sandbox: a stand-in for the vendor Dataoorts that speaks its wire format and draws by rules.

It is a vendor, not a part of the service: nothing here imports `api`, `worker` or `shared`, and they do not import it.
"""
