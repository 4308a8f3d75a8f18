"""HTTP: the API that SDKs and command lines speak. Imported only where sandboxd.yaml has http."""
