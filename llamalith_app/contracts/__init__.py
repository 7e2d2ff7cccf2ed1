"""The contracts: the shape of everything that crosses a wire, with limits in the types."""
