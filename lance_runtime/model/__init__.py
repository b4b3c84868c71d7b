"""The network: two experts a layer over one shared sequence."""
