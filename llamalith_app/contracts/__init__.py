"""The shapes of everything that crosses a wire, with their limits in the types."""
