from page_figures import drawn_figures, undrawn_figures

__all__ = ["drawn_figures", "undrawn_figures"]
