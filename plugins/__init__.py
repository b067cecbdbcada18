"""What pytest and hypothesis load by themselves where flexattn is installed. It imports neither flexattn nor torch.

It is a package of its own because an import of anything inside `flexattn` is one of torch, which a test run may not need.
"""
