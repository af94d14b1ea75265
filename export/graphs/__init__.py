"""The models in the form in which they leave: tensors in, tensors out, shapes free where asked."""
