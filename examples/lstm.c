/* The equations of the cell in C99. `c_header.py` writes its twelve weights. */
#include <math.h>
#include <stdio.h>
#include "lstm_weights.h"
static float z(const float W_x[FEATURES][UNITS], const float W_h[UNITS][UNITS],
               const float b[UNITS], const float *x, const float *h, int k) {
    float sum = b[k];
    for (int n = 0; n < FEATURES; n++) sum += x[n] * W_x[n][k];
    for (int n = 0; n < UNITS; n++) sum += h[n] * W_h[n][k];
    return sum;
}
static float sigmoid(float value) { return 1 / (1 + expf(-value)); }
static void step(const float *x, const float *h, float *h_new, float *c) {
    for (int k = 0; k < UNITS; k++) {
        float i = sigmoid(z(W_xi, W_hi, b_i, x, h, k));
        float f = sigmoid(z(W_xf, W_hf, b_f, x, h, k));
        float o = sigmoid(z(W_xo, W_ho, b_o, x, h, k));
        float c_tilde = tanhf(z(W_xc, W_hc, b_c, x, h, k));
        c[k] = f * c[k] + i * c_tilde;
        h_new[k] = o * tanhf(c[k]);
    }
}
int main(void) { /* reads inputs, FEATURES numbers per time step; prints the last h */
    float x[FEATURES], h[2][UNITS] = {{0}}, c[UNITS] = {0};
    int t = 0, n = 0;
    for (; scanf("%f", &x[n]) == 1; n = (n + 1) % FEATURES)
        if (n == FEATURES - 1) step(x, h[t % 2], h[(t + 1) % 2], c), t++;
    for (int k = 0; k < UNITS; k++) printf("%.9g\n", h[t % 2][k]);
}
