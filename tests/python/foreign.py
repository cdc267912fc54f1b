"""Also read as text, by programs that have no torch."""


class Foreign:
    """An array of neither torch nor NumPy, which speaks DLPack and says nothing else of itself."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()
